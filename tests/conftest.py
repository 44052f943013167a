"""One thread for each worker: two would wait for each other on two cores, at several times the cost."""

import torch

torch.set_num_threads(1)
