"""One server an adapter: how the connections of its protocol objects freeze and thaw."""
