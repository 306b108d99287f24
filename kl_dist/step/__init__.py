"""One step: `agreement` comes first, with `redistribution` of gradients that lie elsewhere; `engine` runs the plan,
`stacks` compute, `trips` carry; `clock`, `stats` tell."""
