"""The super-resolution application: networks, data, metrics, training and evaluation."""
