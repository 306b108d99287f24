"""`{"optimizer": {"type": "KLShampoo", "params": {...}}}` in a DeepSpeed config, at ZeRO 0, 1, 2 and 3.

Importing this is all there is to do.
"""

from deepspeed_integration.optimizer import KLSOAP, SOAP, KLShampoo, Shampoo
from deepspeed_integration.registration import register

register()

__all__ = ["KLSOAP", "SOAP", "KLShampoo", "Shampoo"]
