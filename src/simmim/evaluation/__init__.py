"""What features are worth.

- `readout`: features of a layer, pooled: what the probes, `embed` and a frozen classifier read
- `probe`: kNN and linear probe
- `metrics`, `average_precision`: scores and their confidence
"""
