"""Makes the networks faster or smaller. Each method is one call, which Wuerstchen.load makes."""
