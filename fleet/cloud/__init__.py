"""EC2 instances: launched under a lease, and never outliving it.

leases.py is what the session knows; aws.py is the only way to AWS; up, down, extend and reap are the verbs.
"""
