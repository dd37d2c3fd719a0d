"""ABC and cosine attention beside softmax: speed and memory against length, and the quality of trained models."""
