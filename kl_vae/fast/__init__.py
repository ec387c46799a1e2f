"""Ways to compute what the plain modules do, faster or in less memory, with the same numbers.

Each module here holds one of them, knows torch alone, and can be deleted: its callers have the
plain computation beside it. `kl_vae.acceleration` chooses among them.
"""
