"""The boxes of the model that have weights: encoder, projector, backbone, voice decoder, duplex predictor."""
