"""Who is still there: ranks that hear of each other by a store, so that one that has stopped is named and ends the job.

    watch = Watch(store, rank, size, patience=300)
    watch.start()
    watch.doing("step 12")                          # what this rank is at, in words; a call costs microseconds
    watch.doing("saving step 12", unhurried=True)   # may take long on one rank while the others wait
    watch.stop()

A rank that dies closes its connections and all others fail at once. One that stops, because its host is cut off, its
disk hangs, a debugger or SIGSTOP holds it, leaves them waiting in a collective, for half an hour by torch's defaults.
So a thread of every process puts signs of life into the store, and the first rank reads them all. Two things are told
apart:

- *silent*: no new sign for `patience` seconds. All threads of the process are stopped, or no packet comes through.
- *behind*: nobody has begun a collective for `patience` seconds, and some have begun fewer than others, which wait for
  them. torch counts the collectives of every process group; these are counted from a rank's last step on.

Where all are at work nobody is behind, so a long step, evaluation or compilation ends nothing. Who is behind and
`unhurried` is named, and waited for `LONG` times as long. A rank that cannot reach the store ends by itself.

A process sends a few messages in each eighth of the patience, at most 5 s; the first rank one more for every rank,
while these begin. `signs.py` says what is told and what follows from it, `threads.py` tells and listens.
"""

from kl_dist.watch.signs import LONG
from kl_dist.watch.threads import Watch

__all__ = ["LONG", "Watch"]
