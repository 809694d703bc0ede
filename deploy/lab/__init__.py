"""The lab: a whole cluster on one machine, devices without hardware, a guest that checks itself, and the demo.

The product never imports it. It reaches `drover` through entry points (pyproject.toml).
"""
