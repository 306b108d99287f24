"""Where parameters live: how a whole matrix's gradient is found there, and where its update goes.

`layout` says what a layout is, `dtensor` and `fragment` are two, `placement` knows them all and tells the plan; `local`
reads gradients from this rank's shards and writes updates into them; `reduction` has DDP reduce gradients to owners.
"""
