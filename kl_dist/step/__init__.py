"""One step: `agreement` comes first, `engine` runs the plan, `stacks` compute, `trips` carry; `clock`, `stats` tell."""
