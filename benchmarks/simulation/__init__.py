"""A deterministic simulation of a store: its own code over a simulated clock, disk and processes.

One seed decides everything: who goes on at each step, what is killed, what a power cut takes, which
calls fail, what time it is. So a run that finds something finds it again. What is the product's and
what is simulated is said in `install`.
"""
