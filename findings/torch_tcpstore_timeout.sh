#!/usr/bin/env bash
# torch: the timeout of a TCPStore does not hold where its server does not answer at all.
#
# A client's get() of a missing key, and check() and compare_set() of any, with a timeout of 3 s, against a server whose
# process is stopped (a host that is cut off does the same): all still wait after 15 s. On its timeout get() asks the
# server to forget the request, and waits for the answer to that without a limit. torchrun's agents call these in their
# heartbeats, so one that is cut off from the head waits for as long as TCP tries, about 15 minutes.
set -eu
python=${PYTHON:-python}
"$python" - <<'PYTHON'
import os, signal, subprocess, sys, time

SERVER = """
import time, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""
CLIENT = """
import sys, time, datetime, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=False, timeout=datetime.timedelta(seconds=3))
print("connected", flush=True)
sys.stdin.readline()
began = time.monotonic()
try:
    eval(sys.argv[2])
except Exception as error:
    print(type(error).__name__)
print(f"after {time.monotonic() - began:.0f} s")
"""
import torch
print("torch", torch.__version__)
server = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
port = server.stdout.readline().strip()
calls = ("store.get('missing')", "store.check(['any'])", "store.compare_set('any', '', 'new')")
clients = [
    subprocess.Popen([sys.executable, "-c", CLIENT, port, call], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                     stderr=subprocess.DEVNULL, text=True)
    for call in calls
]
for client in clients:
    client.stdout.readline()
os.kill(server.pid, signal.SIGSTOP)
for client in clients:
    client.stdin.write("\n")
    client.stdin.flush()
time.sleep(15)
for call, client in zip(calls, clients):
    still = client.poll() is None
    print(f"{call}: {'still waits after 15 s' if still else client.stdout.read().strip()}")
for process in (*clients, server):
    process.kill()
PYTHON
