"""Memory and seconds of a step before a machine is rented: `sapo estimate`; see docs/estimate.md."""
