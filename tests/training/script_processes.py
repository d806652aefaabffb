"""What on_main promises, said by each of several processes; tests start it under torchrun."""

import sys

from data.schemas import InputError
from training.processes import leave_together, on_main, process_state

state = process_state()
said: list[str] = []
on_main(lambda: on_main(lambda: said.append("written")))


def refuse() -> None:
    raise InputError("full disk")


try:
    on_main(lambda: on_main(refuse))
except InputError as error:
    said.append(str(error))
line = f"process {state.process_index} of {state.num_processes}: {', '.join(said)}\n"
sys.stdout.write(line)  # in one piece: print may mix the lines of two processes
sys.stdout.flush()
leave_together()
