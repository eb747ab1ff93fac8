"""Send requests to organizations and receive their replies, in a simulation or over a SuperLink."""
