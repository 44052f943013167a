"""The checks of torch's own optimizer suite, on `OptimizerInfo` entries for ours; here those of entries and errors.

Of steps they are in test_torch_contract_steps.py, of state and hooks in test_torch_contract_state.py.

torch.testing ships the entries' classes and inputs that must fail, but not its test_optim.py, whose checks these are:

| torch's check | here |
|---|---|
| optim_infos_do_not_specify_global_cliquey_kwargs | ported: test_infos_leave_the_implementation_alone |
| errors | ported: test_torchs_error_inputs, test_error_inputs; a bare tensor and partly named parameters are accepted |
| forloop_goes_right_direction, with_lrsched, non-contiguous | ported: test_goes_in_the_right_direction |
| param_group_with_lrscheduler_goes_right_direction | ported: test_groups_with_a_scheduler_go_in_the_right_direction |
| param_groups_lr, param_groups_weight_decay | ported: test_groups_have_their_own_lr, ..._weight_decay |
| tensor_lr | ported: test_a_tensor_lr_is_a_number |
| maximize (part of the inputs) | ported: test_maximize_is_minimizing_the_negated_loss |
| step_is_noop_when_params_have_no_grad | ported: test_no_gradients_no_step, which holds frozen parameters too |
| step_is_noop_for_zero_grads | ported: test_zero_gradients_leave_all_but_the_decay |
| foreach_matches_forloop, mixed_device_dtype | ported, on one device: test_agrees_with_a_loop_over_parameters |
| set_default_dtype_works_with_foreach | ported: test_another_default_dtype |
| non_empty_state | ported: test_state_is_not_empty |
| state_dict_deterministic | ported: test_state_dict_is_deterministic |
| save_load_equality_with_weights_only | ported: test_saved_is_loaded |
| load_nontensor_step | ported: test_a_step_count_saved_as_a_tensor_loads (ours is a plain int) |
| can_load_older_state_dict | elsewhere: tests/data holds checkpoints of 0.1.0, for the tests of checkpoints |
| can_load_from_to_named_state_dict | not applicable: the model names parameters, and checkpoints hold these |
| deepcopy_copies_all_public_attrs | ported: test_deepcopy_copies_public_attributes; more in test_copies.py |
| adamw_serialization | ported: test_pickles |
| optimizer_can_be_printed | ported: test_prints |
| step_pre_hook, step_post_hook, step_all_hooks | ported: test_step_hooks |
| state_dict_(pre/post)_hook | ported: test_state_dict_hooks |
| load_state_dict_(pre/post)_hook, and_prepend | ported: test_load_state_dict_hooks |
| complex, complex_2d | not applicable, no score is complex: test_complex_parameters_are_refused |
| rosenbrock_sparse, sparse inputs | not applicable, the diagonal is dense: test_sparse_gradients_are_refused |
| add_param_group, closures (in other checks) | ported: test_a_group_can_be_added, test_the_closures_loss_is_returned |
| fused_* | not applicable: no such argument, the kernel is chosen by dtype and layout (test_update_fused.py) |
| grad_scaling_autocast_fused_optimizers | not applicable, like fused; a GradScaler in test_optim_interface.py |
| foreach_large_tensor | not applicable on a CPU: it needs 2^31 entries; sizes up to 3e5 in test_update*.py |
| peak_memory_foreach | not applicable on a CPU, whose allocator does not count; benchmarks/ measure it |
| capturable, cudagraphs, cpu_load_state_dict | not applicable: a graph cannot hold a refresh's decisions |
| differentiable | not applicable: steps are made without a graph, as preconditioners have no derivative here |
| defaults_changed_to_foreach | not applicable: there is one implementation, over lists of tensors |
| multigpu, state_dict_with_cuda_params | not applicable without a GPU; a moved model in test_precision.py |
| LBFGS's, Muon's and SparseAdam's own | not applicable |
"""

import pytest
import torch
from torch import nn
from torch.testing._internal.common_optimizers import get_error_inputs_for_all_optims

from tests.torch_contract_setup import LOSS, Owner, _build, _linear, _same, _train, _weights, configured, each


@configured
def test_infos_leave_the_implementation_alone(info, config):
    assert not {"foreach", "fused", "differentiable", "capturable"} & config.kwargs.keys()
    for flag in ("foreach", "fused", "differentiable", "capturable"):
        with pytest.raises(TypeError, match=flag):
            _build(info, config, **{flag: True})


@each
def test_error_inputs(info):
    for row in info.optim_error_inputs_func("cpu", torch.float32):
        with pytest.raises(row.error_type, match=row.error_regex):
            _build(info, row.optimizer_error_input)


ACCEPTED = ("invalid param type", "all optimizer params should be", "all optimizer param groups should be")
"""Of torch's inputs that must fail: one tensor is a list of one; names are the model's, others are not looked at."""


@each
def test_torchs_error_inputs(info):
    for row in get_error_inputs_for_all_optims("cpu", torch.float32):
        given = row.optimizer_error_input
        model = Owner(_tensors(given.params)) if given.params is not None else _linear()
        if given.desc.startswith(ACCEPTED):
            optimizer = info.optim_cls(model, LOSS, params=given.params, **given.kwargs)
            assert [p for g in optimizer.param_groups for p in g["params"]] == list(model.parameters())
            continue
        regex = "lr=tensor" if "lr" in given.kwargs else row.error_regex
        with pytest.raises(row.error_type, match=regex):
            info.optim_cls(model, LOSS, params=given.params, **given.kwargs)
        assert not model._forward_hooks


def _tensors(params):
    if isinstance(params, torch.Tensor):
        return [params]
    if isinstance(params, dict):
        return _tensors(params["params"])
    found = [p for item in params if not isinstance(item, str) for p in _tensors(item)]
    return list(dict.fromkeys(found))


@each
def test_parameters_of_other_kinds_are_refused(info):
    for params, match in (
        ([], "empty"),
        ([3], r"params|Tensor"),
        ([nn.Parameter(torch.zeros(3))], "not a parameter of model"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            _build(info, params=params)


@each
def test_complex_parameters_are_refused(info):
    with pytest.raises(TypeError, match=r"'all\.0' is complex"):
        _build(info, model=Owner([nn.Parameter(torch.randn(2, dtype=torch.complex64))]))


@each
def test_sparse_gradients_are_refused(info):
    model, optimizer = _build(info)
    _train(model, optimizer, 1)
    before = _weights(model)
    model.weight.grad = model.weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="'weight' is sparse"):
        optimizer.step()
    assert _same(before, model.parameters())
