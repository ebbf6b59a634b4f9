// Package steer decides which listeners of a reuseport group get new connections.
//
// The kernel keeps the listening sockets of one form (family, IPV6_V6ONLY, address, port, device, owner), all with SO_REUSEPORT, as a
// group, and spreads connections over them by a hash. A [Group] puts a BPF program in the hash's place: connections go to the listeners
// that [Group.Steer] names and to no other, except those of a prober, whose address and port [Group.Probe] names.
//
// What a Group promises holds for connections whose SYN arrives after the method returned. A handshake under way stays with the listener
// that got its SYN; if that listener is closed before the handshake is complete, or before the connection is accepted, the
// connection migrates to a steered one ([Extended]) or is reset ([Classic]).
//
// A Group knows the listeners that it was given. One that joined the kernel's group without it gets no connection, but in [Classic] mode
// it shifts the kernel's order and so misleads the program.
package steer

// Mode is the means by which a [Group] steers.
type Mode uint8

const (
	// None steers nothing: the kernel spreads connections over all listeners of the group.
	None Mode = iota
	// Classic is a classic BPF program that returns an index in the kernel's order of the group. It needs no privilege. Nothing migrates.
	Classic
	// Extended is an eBPF program. What waits on a listener that is closed migrates to the steered ones. It needs CAP_BPF.
	Extended
)

// String returns the mode's name.
func (m Mode) String() string {
	switch m {
	case Classic:
		return "classic BPF"
	case Extended:
		return "eBPF"
	}
	return "none"
}
