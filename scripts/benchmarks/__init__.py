"""The parts of scripts/bench: each measures one promise of speed and judges nothing."""
