"""Questions about pictures, and what methods keep of them."""
