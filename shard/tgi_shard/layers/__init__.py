"""Building blocks of the decoder. Each holds this rank's part of the weights and is called once per step."""
