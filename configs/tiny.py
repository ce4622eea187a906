# All phases in seconds, with nothing to download: a random two-layer model and a made-up language.
model = "tiny-random"
data = "toy-sentiment"
dtype = "float32"
lower_lr = upper_lr = 1e-2  # a random base takes larger steps than a pretrained one
search_steps, retrain_steps = 50, 70
