"""Distributed KL-Shampoo, KL-SOAP, SOAP, Shampoo and Muon for PyTorch.

    opt = KLShampoo(param_groups(model, lr=1e-2), lr=1e-2)

Where to look, from the top down; each line needs those below it alone:

    optimizer.py   KLShampoo, a torch.optim.Optimizer: the shell; clipping.py, saving.py and, for Trainer and
                   Accelerate, huggingface.py are functions on it
    state_dicts.py the half of that shell which is saved, loaded and copied
    torchtitan.py  the container of optimizers that torchtitan builds; imported by nothing in here
    cli/           the command kl-shampoo, which plans for ranks that are not there; imported by nothing in here
    checkpoint/    what is saved, and how it comes back at another world size or in another layout
    step/          one step: agree, bring gradients to the owners, update, refresh, bring updates back
    layouts/       where parameters live: whole, DTensors, fragments of flat memory
    groups.py      parameter groups: names, which method serves what, and plan() for a model
    modules.py     what a model's modules say: embeddings, output head, experts and other stacks
    planning/      who does what: units, owners, buckets, bytes; frozen data, made before the first step
    options.py     every option and its default
    ranges.py      which values an option may have
    methods/       the maths, one update rule a file
    ranks.py       the ranks and their collectives, beside all of this
    watch/         who is still there: a rank that has stopped is named and ends the job; for the jobs that train

docs/algorithm.md tells of the methods, docs/partition.md of the plan, with a glossary.
"""

from kl_dist.clipping import clip_grad_norm_, clip_grad_value_
from kl_dist.groups import param_groups, plan
from kl_dist.methods import METHODS
from kl_dist.optimizer import KLShampoo
from kl_dist.planning.plan import Plan
from kl_dist.saving import full_state_dict, load_full_state_dict

__version__ = "0.1.0"

__all__ = [
    "METHODS",
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
