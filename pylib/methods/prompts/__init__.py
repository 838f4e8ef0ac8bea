"""Prefix tuning, P-tuning v1 and v2, and prompt tuning, as their papers have them."""
