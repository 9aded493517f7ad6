(()=>{const list=document.getElementById('cards'),form=document.getElementById('filter');if(!list)return;
const cards=[...list.children];
const answers=(card,model,question)=>[...card.querySelectorAll('.marks li')].filter(mark=>
(!model||mark.closest('figure').dataset.model===model)&&(!question||mark.dataset.question===question));
const count=(marks,kind)=>marks.filter(mark=>mark.className===kind).length;
const differ=marks=>{const seen={};return marks.some(mark=>{const q=mark.dataset.question;seen[q]??=mark.className;
return seen[q]!==mark.className})};
const fits=(card,{model,question,verdict,kind,agent})=>{
if(kind&&card.dataset.kind!==kind||agent&&card.dataset.agent!==agent)return false;
if(!verdict)return true;
const marks=answers(card,verdict==='differ'?'':model,question);
return verdict==='differ'?differ(marks):verdict==='yes'?marks.length>0&&count(marks,'yes')===marks.length:
count(marks,verdict)>0};
const apply=()=>{const chosen=Object.fromEntries(new FormData(form));let shown=0;
const failures=new Map(cards.map(card=>[card,chosen.order==='record'?0:
count(answers(card,chosen.model||form.dataset.lead,chosen.question),'no')]));
const sorted=[...cards].sort((a,b)=>failures.get(b)-failures.get(a)||a.dataset.number-b.dataset.number);
if(sorted.some((card,i)=>list.children[i]!==card))list.append(...sorted);
for(const card of cards){card.hidden=!fits(card,chosen);shown+=!card.hidden;
for(const figure of card.querySelectorAll('figure'))
figure.hidden=Boolean(chosen.model&&figure.dataset.model&&figure.dataset.model!==chosen.model)}
form.querySelector('output').textContent=`${shown} of ${cards.length} tasks`};
if(form){form.hidden=false;form.onsubmit=event=>event.preventDefault();form.onchange=apply;apply()}
for(const row of list.querySelectorAll('.scrub'))row.hidden=false;
list.addEventListener('input',({target})=>{if(target.type!=='range')return;const films=target.closest('.films');
films.classList.add('held');target.nextElementSibling.hidden=false;
target.setAttribute('aria-valuetext',`frame ${+target.value+1} of ${+target.max+1}`);
for(const film of films.querySelectorAll('.film')){const last=film.style.getPropertyValue('--n')-1;
film.style.backgroundPosition=`${100*Math.round(target.value/target.max*last)/last}% 0`}});
list.addEventListener('click',({target})=>{const row=target.closest('button')?.closest('.scrub');if(!row)return;
row.parentNode.classList.remove('held');row.firstElementChild.focus();row.lastElementChild.hidden=true;
for(const film of row.parentNode.querySelectorAll('.film'))film.style.backgroundPosition=''})})();
