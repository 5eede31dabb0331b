"""The peers' applications. They run in .peers, the peers' own environment: nothing of the product is imported here."""
