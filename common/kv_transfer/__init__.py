"""Moving keys and values between processes."""
