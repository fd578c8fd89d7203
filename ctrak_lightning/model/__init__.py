"""The module that is traced: what of it trains, what stays, and the function that it computes."""
