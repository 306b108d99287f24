"""What is saved, and how it comes back.

`inventory` names every tensor and its holders, `holdings` has this rank's memory of each, `divided` shows it to
torch.distributed.checkpoint and `shown` to the user; `saved` understands any form of a state dict, `load` checks and
copies, `full` collects all of it on one rank; `sums` are the checksums that travel with the state, `seals` what a group
says of itself, `verify` compares both; `manifest` tells whether files are as they were written, `reading` reads what a
stranger may have written.
"""
