"""Which parameters are judged together: the layers of a network, or the user's own groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from fishopt.passes import unwrapped

Groups = dict[str, tuple[str, ...]]
"""Group name -> names of its trainable parameters."""

UserGroups = Mapping[str, Sequence[str | Tensor]] | Sequence[Sequence[str | Tensor]]
"""Groups as a user gives them: named, or in a list; of parameters or of their names."""


def layers(model: nn.Module) -> Groups:
    """One group for each module that owns trainable parameters, as in the paper; the module's path is its name."""
    return by_layer(name for name, p in unwrapped(model).named_parameters() if p.requires_grad)


def by_layer(names: Iterable[str]) -> Groups:
    """Parameter names grouped by the module that owns them."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.rpartition(".")[0] or "model", []).append(name)
    return {group: tuple(members) for group, members in found.items()}


def named_groups(model: nn.Module, groups: UserGroups) -> Groups:
    """The user's groups by parameter names.

    Raises:
        ValueError: If a member is not a trainable parameter of the model, or belongs to two groups.
        TypeError: If ``groups`` is neither a mapping nor a list, or a group no list.
    """
    if isinstance(groups, list | tuple):
        groups = {f"group {i}": members for i, members in enumerate(groups)}
    if not isinstance(groups, Mapping):
        raise TypeError(
            f"groups={groups!r}: pass a dict from group name to parameters or their names, or a list of them"
        )
    if not groups:
        raise ValueError("groups is empty; name at least one group, or leave it out for one group per layer")
    names_of = {id(p): name for name, p in unwrapped(model).named_parameters() if p.requires_grad}
    taken: dict[str, str] = {}
    result: Groups = {}
    for group, members in groups.items():
        names = tuple(_name_of(member, names_of, group) for member in _listed(members, group))
        for name in names:
            if name in taken:
                raise ValueError(f"groups: parameter {name!r} is in {taken[name]!r} and in {group!r}; keep it in one")
            taken[name] = group
        result[group] = names
    return result


def _listed(members: Sequence[str | Tensor] | str | Tensor, group: str) -> list[str | Tensor]:
    if members is not None and not isinstance(members, Iterable):
        raise TypeError(f"groups[{group!r}]={members!r}: pass a list of parameters or of their names")
    listed: list[str | Tensor] = [members] if isinstance(members, str | Tensor) else list(members or ())
    if not listed:
        raise ValueError(f"groups[{group!r}]={members!r} is empty; name at least one parameter")
    return listed


def _name_of(member: str | Tensor, names_of: dict[int, str], group: str) -> str:
    if isinstance(member, str) and member in names_of.values():
        return member
    if isinstance(member, Tensor) and id(member) in names_of:
        return names_of[id(member)]
    shown = f"a tensor of shape {tuple(member.shape)}" if isinstance(member, Tensor) else repr(member)
    raise ValueError(f"groups[{group!r}] holds {shown}, which is not a trainable parameter of the model")
