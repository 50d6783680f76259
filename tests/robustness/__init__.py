"""Everything at once: real applications, real workers, real faults, and a model of what must be there in the end.

traffic   applications, each a process of its own, that write rows and intents in all the ways that are allowed
nemesis   kills, pauses and stops everything else, and acts as an operator; a schedule drawn from a seed
model     pure: what committed → what must be at each participant
check     what is there, read from the participants themselves, against the model
report    the result, with a count of each fault that was injected

After etcd's robustness tests. The README says how to run it and what it has found.
"""
