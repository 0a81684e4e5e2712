"""What each way of fine-tuning learns and forgets, measured on real pictures; run by `python dev.py evidence`.

`bases` has the models, `methods` the ways to train them, `measures` what is measured, `one` a single run in a
process of its own, `plan` which runs there are, and `report` writes docs/evidence.md from what they left.
"""
