"""CogVideoX-2B as diffusers publishes it."""
