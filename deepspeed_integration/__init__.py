"""`{"optimizer": {"type": "KLShampoo", "params": {...}}}` in a DeepSpeed config, at ZeRO 0, 1, 2 and 3.

Importing this is all there is to do. `optimizer` is what DeepSpeed constructs, `partitions` finds the parameters in
what it makes of them, `checkpoint` and `universal` save; `wrapping` and `refusals` stand where its engine begins,
`registration` where it looks for a type. docs/deepspeed.md is for users.
"""

from deepspeed_integration.optimizer import TYPES
from deepspeed_integration.registration import register

register()

KLShampoo, KLSOAP, SOAP, Shampoo, KLMuon = (
    TYPES[title] for title in ("KLShampoo", "KLSOAP", "SOAP", "Shampoo", "KLMuon")
)

__all__ = ["KLSOAP", "SOAP", "KLMuon", "KLShampoo", "Shampoo"]
