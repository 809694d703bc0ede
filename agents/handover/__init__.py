"""One attempt to move a guest, from the agents' side.

The coordinator opens the attempt in the guest's record, asks the destination's agent to prepare and the source's to
conduct. From there the two need nobody but each other and the ledger.

Who decides, without clock or I/O, explored in every order (tests/exploration):

    words.py        commands and events, the words of both machines
    source/         the source's half: precopy.py (bind, gate), blackout.py (freeze, check, COMMIT), outcome.py (what
                    the ledger says), back.py (every way back); machine.py's TABLE says which stage takes which event,
                    and why
    destination.py  the destination's half: load, validate, wait for the ledger's word, take over; likewise
    table.py        what a table is; InvalidTransition
    timers.py       which timers run follows from the state

Who does it:

    preflight.py    looks at what could only fail later, before anything begins
    shell.py        events in, one step, commands out; timers, notes, background tasks
    source_shell.py, destination_shell.py
                    what each command means: engine, devices, ledger, the other agent
    ledger.py       the record's transitions as compare-and-sets: bind, COMMIT, ABORT, DONE, roll-back, CRASHED
    peer.py         the port to the other agent
    attempt.py      an attempt as its agent holds it, Departure or Arrival: conducted, spoken to, and everything that
                    belongs to its end; report.py is what it came to

A clean attempt: the keeper prepares (WAITING) and conducts (BINDING, PRECOPY). Devices ask for ACKs, the gate opens,
the engine stops the guest (FREEZING), the check passes (LAST_PASS). Everything arrives (VALIDATING, LOADED), the source
submits the COMMIT (SUBMITTED, COMMITTED) and says GO; the destination writes its marker (MARKING), sets devices and
guest going (ACTIVATING, STARTING) and writes DONE; only then the source discards its copy. Before the COMMIT the source
may let the guest run on at any time and write the ABORT afterwards; after it the ledger alone decides. An agent that
was restarted conducts nothing: it ends what it finds. The rules are those of docs/protocol.md.
"""
