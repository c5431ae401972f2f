"""Options of a calibration of a second."""

SMALL = ["--seqlen", "32", "--nsamples", "4", "--group_size", "10"]
