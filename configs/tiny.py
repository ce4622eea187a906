# All phases in seconds, with nothing to download: a random two-layer model and a made-up language.
model = "tiny-random"
data = "toy-sentiment"
dtype = "float32"
