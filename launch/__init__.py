"""What people start: `launch/train.py` trains a small language model with any of the optimizers compared here.

The files are the parts of a training job, each readable on its own:

    train.py        the job from start to end, and its loop
    options.py      every command-line flag, its default and its check
    ranks.py        the processes: which one this is, on which device, and what they tell each other
    parallel.py     how the model lies over them: DDP, FSDP2, HSDP, tensor parallel
    data.py         the text, its split by file, and the batch of a step
    model.py        a byte-level GPT
    optimizers.py   AdamW, Muon and the Kronecker methods behind one small object, and their schedule
    muon.py         torch's Muon with products in float32, for CPUs
    checkpoint.py   saving and continuing, by torch.distributed.checkpoint
    folders.py      the checkpoints of a run: the newest, those to keep, those to move aside
    identity.py     which run a folder is of, and the lock of the job that is at it
    signals.py      being asked to stop
    endings.py      the exit statuses, and the words that go with them
    records.py      a run's JSON lines, of which `kl-shampoo report` makes a page
    metrics.py      the progress bar and TensorBoard
    report.py       the loss curve and the closing words

another job on the same parts:

    lora.py         a small GPT-2 fine-tuned by peft's adapters

the same model and text by other libraries' loops:

    train_lightning.py   a LightningModule and its data, started by LightningCLI; recorder.py is its callback
    train_deepspeed.py   the same with DeepSpeed's engine
    hf_trainer.py        a small GPT-2 under Hugging Face's Trainer: DeepSpeed, DDP, FSDP2
    configs/             files for these: DDP and FSDP2, ZeRO 0 to 3; several hosts by Slurm, Kubernetes, a hostfile
    multinode.sh         one host's share of any of these jobs on several hosts; it asks reach.py which interface leads
                         to the others, and starts agent.py, which is torchrun with last words
    gpu.sh               all that only a GPU can tell, for a machine with one: tests, a step's cost, a comparison

and of a comparison of many such jobs:

    compare.py      the runs of a command line, trained one after another or two at once, and ranked
    runs.py         one of them: what identifies it, how it is measured
    regression.py   a second task: ill-conditioned regression
    results.py      the file of finished runs
    standings.py    the table and the picture
"""
