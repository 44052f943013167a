"""Networks as people write them: name -> how to build one, what it is called with, and by which way it is covered.

There is a module for each family of them.
"""

from __future__ import annotations

from tests.networks.arguments import ARGUMENTS
from tests.networks.attention import ATTENTION
from tests.networks.changing import CHANGING
from tests.networks.hidden import HIDDEN, OldProduct
from tests.networks.images import IMAGES
from tests.networks.parameters import PARAMETERS
from tests.networks.recurrent import RECURRENT
from tests.networks.shared import Net, Network, parameter
from tests.networks.weights import WEIGHTS

__all__ = ["NETWORKS", "Net", "Network", "OldProduct", "parameter"]

FAMILIES = (ATTENTION, IMAGES, RECURRENT, ARGUMENTS, PARAMETERS, WEIGHTS, HIDDEN, CHANGING)
NETWORKS: dict[str, Network] = {name: network for family in FAMILIES for name, network in family.items()}
assert len(NETWORKS) == sum(map(len, FAMILIES)), "two families have a network of the same name"
