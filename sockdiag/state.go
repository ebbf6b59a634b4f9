package sockdiag

import "strconv"

// A State is a TCP socket's state, numbered as the kernel does.
type State uint8

// The states of a TCP socket.
const (
	Established State = iota + 1
	SynSent
	SynReceived
	FinWait1
	FinWait2
	TimeWait
	Closed
	CloseWait
	LastAck
	Listen
	Closing
)

var stateNames = [...]string{
	Established: "ESTABLISHED", SynSent: "SYN_SENT", SynReceived: "SYN_RECV", FinWait1: "FIN_WAIT1", FinWait2: "FIN_WAIT2",
	TimeWait: "TIME_WAIT", Closed: "CLOSE", CloseWait: "CLOSE_WAIT", LastAck: "LAST_ACK", Listen: "LISTEN", Closing: "CLOSING",
}

// String is the state's name as netstat(8) writes it.
func (s State) String() string {
	if int(s) < len(stateNames) && stateNames[s] != "" {
		return stateNames[s]
	}
	return "state " + strconv.Itoa(int(s))
}

// States is a set of states. The zero value stands for all of them.
type States uint32

// In makes a set of states.
func In(states ...State) States {
	var set States
	for _, s := range states {
		set |= 1 << s
	}
	return set
}

// Has reports whether the state is in the set.
func (set States) Has(s State) bool { return set == 0 || set&(1<<s) != 0 }

// kernel is the set as the kernel wants it.
func (set States) kernel() uint32 {
	if set == 0 {
		return 1<<(Closing+1) - 1
	}
	return uint32(set)
}

// A Timer is what a socket waits for.
type Timer uint8

// What a socket's timer can be for.
const (
	NoTimer         Timer = iota
	RetransmitTimer       // an ACK is overdue when it ends
	KeepaliveTimer        // also the delay of an orphan's end
	TimeWaitTimer         // how long TIME_WAIT lasts
	ProbeTimer            // the peer's window is closed
)
