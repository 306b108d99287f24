"""`kl-shampoo`, the command; it needs the extra `plan`, and nothing else here imports it.

main.py       the command and its subcommands
plan.py       `kl-shampoo plan`: from what is asked for to a table and a picture
models.py     what a model is: built-in shapes, a factory, a Hugging Face config.json
machine.py    how fast a machine computes and communicates: presets, and this CPU, measured
forecast.py   what a plan needs of a machine: arithmetic on a plan, a step's time, what bounds it
advice.py     which option would help
tables.py     the tables; picture.py the picture
report.py     `kl-shampoo report`: the page of a run; run_plots.py its pictures
"""
