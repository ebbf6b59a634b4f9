//go:build linux

package keeper

import (
	"encoding/json"
	"net/netip"
	"syscall"
)

// Version is the protocol's version, told in Hello by both sides.
const Version = 1

// A message is one packet: a request, the reply that carries its ID, or an event with ID 0. Descriptors travel with it.
type message struct {
	ID    uint64          `json:"id,omitempty"`
	Op    string          `json:"op,omitempty"`    // request or event
	Error *Error          `json:"error,omitempty"` // reply
	Body  json.RawMessage `json:"body,omitempty"`
}

// Error is why the keeper did not do what it was asked.
type Error struct {
	Text  string        `json:"text"`
	Errno syscall.Errno `json:"errno,omitempty"`
}

func (e *Error) Error() string { return e.Text }

// Unwrap lets errors.Is meet the errno.
func (e *Error) Unwrap() error {
	if e.Errno == 0 {
		return nil
	}
	return e.Errno
}

// The requests. Each has a method of Client with its name.
const (
	opHello     = "hello"
	opHold      = "hold"
	opStart     = "start"
	opSteer     = "steer"
	opProbe     = "probe"
	opQueues    = "queues"
	opListeners = "listeners"
	opClose     = "close"
	opRelease   = "release"
	opRelay     = "relay"
	opRefuse    = "refuse"
	opDuplicate = "duplicate"
	opState     = "state"
	opExit      = "exit"
)

// Inventory is all that the keeper holds, as Hello gives it to a supervisor that starts.
type Inventory struct {
	Version   int             `json:"version"`
	Config    json.RawMessage `json:"config"`          // the service, as the command line gave it
	State     json.RawMessage `json:"state,omitempty"` // the last blob given to State
	Workers   []Worker        `json:"workers,omitempty"`
	Listeners []Listener      `json:"listeners,omitempty"`
	Means     Means           `json:"means"`
}

// Means is how the keeper can do its work here, and why no better.
type Means struct {
	Steering     string `json:"steering"` // extended, classic
	SteeringWhy  string `json:"steering_why,omitempty"`
	Adoption     string `json:"adoption"` // duplicate (the program's own socket), replace (one of the keeper's in its place)
	AdoptionWhy  string `json:"adoption_why,omitempty"`
	Intercept    bool   `json:"intercept"` // false: only LISTEN_FDS can be handed over
	InterceptWhy string `json:"intercept_why,omitempty"`
}

// Begun is the answer to Start.
type Begun struct {
	Worker Worker `json:"worker"`
	Means  Means  `json:"means"` // a start can find out that something is refused here

	NoCgroup string `json:"no_cgroup,omitempty"` // why it is not in the cgroup that was asked for
}

// Worker is one generation's process as the keeper started it.
type Worker struct {
	Generation int                 `json:"generation"`
	PID        int                 `json:"pid"`
	Exited     bool                `json:"exited,omitempty"`
	Status     *syscall.WaitStatus `json:"status,omitempty"`
	Gone       bool                `json:"gone,omitempty"` // no process of the generation is left
	Outputs    int                 `json:"outputs,omitempty"`
}

// Listener is a listening socket that the keeper holds a descriptor of.
type Listener struct {
	ID         int    `json:"id"`
	Form       Form   `json:"form"`
	Generation int    `json:"generation"` // 0: no program's, a waiting room
	PID        int    `json:"pid,omitempty"`
	Backlog    int    `json:"backlog,omitempty"` // what the program asked for
	Handed     bool   `json:"handed,omitempty"`  // given as LISTEN_FDS
	Own        bool   `json:"own,omitempty"`     // the program's own socket, not one put in its place
	Current    bool   `json:"current,omitempty"` // new connections go to it
	Inode      uint64 `json:"inode,omitempty"`
}

// Queue is a listener's accept queue.
type Queue struct {
	ID      int `json:"id"`
	Waiting int `json:"waiting"`
	Limit   int `json:"limit"`
}

// Hold opens a waiting room: a listener of the keeper's own in which connections wait for a program.
type Hold struct {
	Form Form `json:"form"`
}

// Start begins a generation.
type Start struct {
	Generation int      `json:"generation"`
	Path       string   `json:"path"` // the executable
	Args       []string `json:"args"` // with argv[0]
	Env        []string `json:"env"`  // added to the keeper's own
	Dir        string   `json:"dir,omitempty"`
	Cgroup     string   `json:"cgroup,omitempty"` // an existing cgroup v2 folder to start in
	Hand       []Hand   `json:"hand,omitempty"`   // listeners to hand over as LISTEN_FDS
}

// Hand is one listener to be handed over.
type Hand struct {
	Name string `json:"name"`
	Form Form   `json:"form"`
}

// Probe makes connections from one address go to one listener, whatever the steering; a zero From ends that.
type Probe struct {
	Listener int            `json:"listener"`
	From     netip.AddrPort `json:"from"`
}

// Relay forwards what waits on a listener, whose form the generations do not have, to an address.
type Relay struct {
	Listener int            `json:"listener"`
	To       netip.AddrPort `json:"to"`
}

// Event is what the keeper tells the supervisor unasked; one field is set.
type Event struct {
	Listening *Listener `json:"listening,omitempty"` // a program listens
	Refused   *Refused  `json:"refused,omitempty"`   // a program was not let bind or listen
	Exited    *Worker   `json:"exited,omitempty"`    // a generation's first process ended
	Gone      int       `json:"gone,omitempty"`      // the generation of which no process is left
	Signal    int       `json:"signal,omitempty"`    // a signal that the keeper got
}

// Refused is a bind or listen that failed for a reason of berth's or the kernel's.
type Refused struct {
	Generation int    `json:"generation"`
	PID        int    `json:"pid"`
	Form       Form   `json:"form"`
	Reason     string `json:"reason"`
	Fatal      bool   `json:"fatal,omitempty"` // the generation cannot serve
}
