"""`python -m rear_jax` is `rear-jax`."""

from rear_jax.main import command

if __name__ == "__main__":
    command()
