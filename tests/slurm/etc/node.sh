# What pid 1 of a node would do first. $1 node, $2 address, $3 gateway, $4 place
set -e
hostname "$1"
ip link set lo up
ip addr add "$2/24" dev eth0
ip link set eth0 up
ip route add default via "$3"
# Names come from hosts only: a DNS query from here would wait 10 s or 20 s for a server it cannot reach
# (torch.distributed asks for the name of every peer)
for name in hosts nsswitch.conf resolv.conf; do
    mount --bind "$4/$name" "/etc/$name"
done
mount -t tmpfs -o size=2g tmpfs /dev/shm
