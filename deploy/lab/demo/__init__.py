"""`drover demo`: the main job of Drover as an operator does it, on real parts, judged by what the guests said.

staging     a cluster of its own and the guests of deploy/lab/demo/guests.yaml on one host
incidents   what happens while that host is emptied: somebody watches, and pauses a guest at the right instant
checks      afterwards: let the guests check themselves, ask the API who owns them
judge       PURE: which promises were kept, by the guests' own words
report      the table, the report file
command     one after the other, and nothing left behind at any end
"""
