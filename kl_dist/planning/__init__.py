"""Who does what: units of work, their owners, and what travels when; frozen data, made before the first step.

In the order of the thought: `matrices` reads a tensor as matrices and cuts them into blocks, `units` makes units of
those, `costs` weighs them, `ownership` gives each an owner, `partition` says among how many, `slices` divides what
AdamW serves, `buckets` says what travels together, `boxes` and `traffic` which piece goes where; `plan` is all of it,
`making` makes it, and `links` says what of it crosses nodes.
"""
