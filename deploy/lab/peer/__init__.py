"""The peer outside: talks with guests over the network as their users do, and says how long each did not answer.

outage    PURE: what the times of the answers prove
talk      one guest: a TCP connection and UDP datagrams, a numbered message each few milliseconds
program   the process in the guests' network (`python -m deploy.lab.peer`)
client    starts it, and asks it
"""
