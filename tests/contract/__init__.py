"""What we take from other libraries without their promise: each test fails when one of them changes it."""

RUN_WITH = {
    "transformers": ("5.19", "5.23.0"),
    "trl": ("1.14", "1.16.0"),
    "peft": ("0.19", "0.21.0"),
    "accelerate": ("1.12", "1.15.0"),
    "torch": ("2.7", "2.13.0"),
}
"""The lowest and the newest version these tests were run with (`make test-versions`, `make test`)."""
