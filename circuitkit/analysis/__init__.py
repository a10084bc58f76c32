"""What a trained network does, as data: each function returns a frozen dataclass that can draw itself."""
