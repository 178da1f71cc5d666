"""How migrations converge: a module for each policy, which has as `POLICY` its `PolicyType` (migration/parameters.py).

What a policy is asked, and may answer, is in migration/policy.py; `fixed.py` is the shortest.
"""
