"""What tests of every service use: identities, waiting for a condition, embedded servers."""
