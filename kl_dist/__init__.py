"""Distributed KL-Shampoo, KL-SOAP, SOAP and Shampoo for PyTorch.

    opt = KLShampoo(param_groups(model, lr=1e-2), lr=1e-2)

Where to look: `optimizer` is the shell, `engine` one step, `partition` the plan, `methods` the maths, `exchange` the
collectives. docs/algorithm.md and docs/partition.md tell the story.
"""

from kl_dist.clipping import clip_grad_norm_, clip_grad_value_
from kl_dist.optimizer import KLShampoo
from kl_dist.partition import Plan
from kl_dist.routing import param_groups, plan
from kl_dist.saving import full_state_dict, load_full_state_dict

__version__ = "0.1.0"

__all__ = [
    "KLShampoo",
    "Plan",
    "__version__",
    "clip_grad_norm_",
    "clip_grad_value_",
    "full_state_dict",
    "load_full_state_dict",
    "param_groups",
    "plan",
]
